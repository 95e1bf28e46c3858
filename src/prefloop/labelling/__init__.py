"""People rank answers: the store, hand-out, quality, import and export, the server. No torch."""
