"""Alembic's entry point: migrate on the connection that the store hands over."""

from alembic import context

from prefloop.labelling.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
