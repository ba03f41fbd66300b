"""What is served to this machine alone stays so: a website that a browser has open can point a name of its own at 127.0.0.1 (DNS
rebinding), and would then read and ask as a page of ours does. Its requests come under its own name.
"""

from __future__ import annotations

from typing import Any

#: As a browser's `Host` has them.
OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")


def local_only() -> Any:
    """Starlette's middleware that answers 400 to requests whose `Host` is no name of this machine."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return Middleware(TrustedHostMiddleware, allowed_hosts=[*OWN_NAMES], www_redirect=False)
