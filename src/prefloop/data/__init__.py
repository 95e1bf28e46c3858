"""From data sets to token batches: `formats` -> `tokenize` -> `stream` -> `batches`."""
