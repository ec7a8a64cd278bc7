"""Methods that were measured or counted before a feature was made of them. Nothing here is exported."""
