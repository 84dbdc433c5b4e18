"""``python -m dwattn``, for environments without the ``dwattn`` script on the path."""

from dwattn.cli import app

app()
