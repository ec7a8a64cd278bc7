"""Prototypes of methods that were measured or counted before a decision; nothing here is exported."""
