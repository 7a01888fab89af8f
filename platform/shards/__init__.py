"""The same data set packed into Parquet files, local or in an object store."""
