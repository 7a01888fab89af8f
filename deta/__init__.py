"""The package of the project: links to the folders ops, model, platform, jobs and dashboards.

A regular package on purpose. As a namespace package, Python would merge `deta.platform` of every
copy on its path, and a module that was deleted here would be imported from an older installed copy.
"""
