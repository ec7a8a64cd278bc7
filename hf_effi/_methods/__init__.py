"""Rows of the table in `hf_effi.methods`, one file per family. `METHODS` joins them."""
