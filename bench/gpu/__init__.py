"""Benches that need a GPU. They are started by hand: `make bench` leaves them out."""
