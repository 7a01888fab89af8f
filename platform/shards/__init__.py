"""Data sets packed into Parquet shards, in a local folder or an object store."""
