"""placeholder until the merge"""

import re

_USER = re.compile(r"://[^/\s]*@")


def without_credentials(location: str) -> str:
    if "://" not in location:
        return location
    return _USER.sub("://", location.partition("?")[0].partition("#")[0])
