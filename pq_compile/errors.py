"""The one exception users see: a sentence that names the culprit and the remedy."""

from torch._dynamo.exc import ShortenTraceback


class Refused(ShortenTraceback):
    """Something was asked for that permuquant will not do; the message says what and what to do instead.

    It derives from Dynamo's ``ShortenTraceback`` so that raised while compiling it reaches the user as
    itself and not wrapped in ``BackendCompilerFailed``.
    """
