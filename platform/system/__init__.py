"""The machine and the outside world: untrusted files, secrets, downloads, child processes."""
