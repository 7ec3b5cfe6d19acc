"""`python -m kalm_integrations.cli`."""

import sys

from kalm_integrations.cli import main

sys.exit(main())
