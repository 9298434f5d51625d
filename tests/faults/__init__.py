"""Faults of the object store, on a real mount of a real store: what the reader gets, when, and what tells of it."""
