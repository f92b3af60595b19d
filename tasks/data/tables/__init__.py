"""Tables: CSV and its relatives, JSON, JSON lines and parquet."""
