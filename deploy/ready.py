"""Succeeds if the service on this machine serves vectors. `/ready` needs the key."""

import os
import sys
from urllib.request import Request, urlopen

url = f"http://127.0.0.1:{os.environ.get('PORT', '8000')}/ready"
key = os.environ["KALM_API_KEY"].split()[0]  # there are two while keys are rotated
try:
    with urlopen(Request(url, headers={"Authorization": f"Bearer {key}"}), timeout=4):
        pass
except OSError as error:
    sys.exit(f"{url}: {error}")
