"""The labelling page: app, templates, static files."""
