"""The one exception users see: a sentence that names the culprit and the remedy."""

from torch._dynamo.exc import ShortenTraceback


class Refused(ShortenTraceback):
    """Something was asked for that permuquant will not do; the message says why and what to do.

    It derives from Dynamo's ``ShortenTraceback`` so that, raised while compiling, it reaches the
    user as itself and not wrapped in ``BackendCompilerFailed``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)
