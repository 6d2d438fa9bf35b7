"""Why a record is not made."""

from __future__ import annotations

from opd.settings import UserError


class Drop(Exception):
    """This record is left out for good. The message: a reason to count, such as `too long`, a colon, details."""


class Failed(Exception):
    """This record could not be made this time, as when an endpoint answers nonsense: the next run tries it again."""


class Unavailable(UserError):
    """Nothing more can be made for now, as when an endpoint is down: what is done is kept, the next run goes on."""
