"""Rows of the table in `hf_effi.methods`, one file a family. `METHODS` joins them."""
