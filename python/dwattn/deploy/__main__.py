"""``python -m dwattn.deploy``, for environments without the ``dwattn-deploy`` script."""

import sys

from dwattn.deploy.commands import main

sys.exit(main())
