"""What people and programs say of answers: feedback, and the labels that state what is true.

The main rule: it counts once. An author has one feedback for each thing it is about, source and category, and one label
for each prediction. Whatever the author says later replaces it, and every call stays on record as a revision. Calls
that bring the time at which they were said lead to the same state in whatever order they arrive, and however often.

Nothing is asked of the prediction: feedback may come before it is stored, years after it, or for one that another
replica has made. Tables are only ever appended to, by one transaction for all the calls that gathered during the last.
"""

from app.feedback.calls import Speaker
from app.feedback.feedback import Counts, Feedback, FeedbackLog, FeedbackSource, Given, Rating
from app.feedback.labels import Label, LabelLog, LabelSource, Stated
from app.feedback.ledger import Revision, Written
from app.feedback.words import Words

__all__ = [
    "Counts",
    "Feedback",
    "FeedbackLog",
    "FeedbackSource",
    "Given",
    "Label",
    "LabelLog",
    "LabelSource",
    "Rating",
    "Revision",
    "Speaker",
    "Stated",
    "Words",
    "Written",
]
