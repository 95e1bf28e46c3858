"""The labelling store. All SQL is in this folder."""

from prefloop.labelling.store.database import Store, Unavailable
from prefloop.labelling.store.transaction import Transaction, key_of

__all__ = ["Store", "Transaction", "Unavailable", "key_of"]
