"""``python -m dwattn.deploy``, for environments without the ``dwattn-deploy`` script."""

from dwattn.deploy.commands import script

script()
