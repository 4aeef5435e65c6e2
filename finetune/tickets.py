"""A small data set to try training on: support tickets that belong to one of six teams.

The main rule: training and held-out tickets share no sentence. A model that learnt sentences by heart gains nothing;
one that learnt what the teams do does. The same seed gives the same bytes.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.dataset import write_dataset

TEAMS = ("billing", "shipping", "returns", "account", "technical", "sales")
PROMPT = "Which team takes this ticket?\n\nTicket: {question}\n\nTeam:"
"""What a release that routes has as its template, and a run as its `prompt`."""

THINGS = ("lamp", "kettle", "headset", "desk", "router", "printer", "backpack", "monitor", "camera", "heater", "drill",
          "speaker", "keyboard", "fan", "scooter", "tablet")  # fmt: skip
PLACES = ("Leeds", "Porto", "Graz", "Turin", "Ghent", "Malmo", "Lyon", "Cork", "Basel", "Gdansk", "Utrecht", "Brno")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "last week", "yesterday", "two days ago")
OPENINGS = ("", "", "Hi, ", "Hello. ", "Good morning, ", "Please help: ", "Dear team, ", "Quick question: ")
ENDINGS = ("", "", " Thanks.", " Thank you in advance.", " Please answer soon.", " Best wishes, {name}.")
NAMES = ("Ana", "Ben", "Chiara", "Dmitri", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jonas", "Kofi", "Lena")

TRAIN = {
    "billing": (
        "I was charged twice for the {thing} on {day}.",
        "The invoice of {day} shows the wrong amount.",
        "Can I pay for the {thing} in three instalments?",
        "My credit card was declined although there is money on it.",
        "Why is there a fee of {n} euros on my bill?",
        "Please send me a receipt for the {thing} with our tax number.",
        "The direct debit of {day} was {n} euros too high.",
        "You still owe me {n} euros from my last bill.",
        "My discount code was not taken off the total.",
        "I need the invoice made out to my company in {place}.",
    ),
    "shipping": (
        "My {thing} has not arrived yet, it was due on {day}.",
        "Where is my parcel? Tracking has not moved since {day}.",
        "The courier left the {thing} with a neighbour I do not know.",
        "How long does delivery to {place} take?",
        "Can you deliver to a parcel shop in {place} and not to my home?",
        "The driver rang nobody's bell and took the package away again.",
        "Please change the delivery address of my {thing} to {place}.",
        "The tracking number you sent is not known to the carrier.",
        "Only one of two boxes came on {day}.",
        "Do you ship the {thing} to {place} by express?",
    ),
    "returns": (
        "I want to send the {thing} back, I do not like the colour.",
        "How do I get a label to return the {thing}?",
        "The {thing} arrived with a crack, I would like to exchange it.",
        "Until when may I give the {thing} back?",
        "I sent the {thing} back on {day}, when do I get my money?",
        "You sent me a {other} in place of the {thing}. How do I swap it?",
        "The {thing} is too big, can I change it for a smaller one?",
        "I have lost the box. Can I still send the {thing} back?",
        "My replacement {thing} has the same scratch as the first.",
        "Who pays the postage if I give the {thing} back?",
    ),
    "account": (
        "I forgot my password and the reset mail does not come.",
        "Please change the e-mail address I log in with.",
        "I cannot sign in since {day}.",
        "How do I delete my profile with all its data?",
        "Someone else seems to have logged in as me from {place}.",
        "My user name is spelled wrong, can you correct it?",
        "The code for two-step login never reaches my phone.",
        "Please merge my two profiles into one.",
        "It says that my login is locked after {n} attempts.",
        "How do I switch off your newsletter in my settings?",
    ),
    "technical": (
        "The {thing} does not turn on any more.",
        "My {thing} shows error {n} and then stops.",
        "How do I connect the {thing} to my phone?",
        "The {thing} makes a loud noise after ten minutes.",
        "After the update the {thing} loses its connection every hour.",
        "The app crashes when I open the page of the {thing}.",
        "The battery of the {thing} lasts only {n} minutes.",
        "Which firmware does the {thing} need?",
        "The display of my {thing} flickers since {day}.",
        "How do I set the {thing} back to factory settings?",
    ),
    "sales": (
        "Do you have the {thing} in blue as well?",
        "Which {thing} would you recommend for a small office?",
        "Is there a discount if we buy {n} of the {thing}?",
        "When will the {thing} be in stock again?",
        "What is the difference between the {thing} and the cheaper one?",
        "We would like a quote for {n} pieces of the {thing}.",
        "Can I see the {thing} in your shop in {place} before I decide?",
        "Does the {thing} come with a longer warranty if I order it now?",
        "Is the new {thing} worth the price compared with last year's?",
        "Do you sell gift cards for the {thing}?",
    ),
}

HELDOUT = {
    "billing": (
        "Two payments for one {thing} left my bank account {day}.",
        "The sum on my statement is {n} euros more than the price I agreed to.",
        "I would like to pay by bank transfer, is that possible?",
        "A corrected bill for the {thing} was promised to me and never came.",
        "Why did you take {n} euros from my card?",
    ),
    "shipping": (
        "Still waiting for the {thing} I ordered, it should have been here {day}.",
        "The package with my {thing} seems to be stuck in {place}.",
        "Could the postman bring the {thing} in the evening?",
        "According to the carrier it was delivered, but there is nothing at my door.",
        "What does it cost to have the {thing} sent to {place}?",
    ),
    "returns": (
        "The {thing} is not what I expected and I would like a refund.",
        "I changed my mind about the {thing}. Where do I send it?",
        "It came broken. Please take the {thing} back and send another.",
        "Is there still time to bring back the {thing} I bought {day}?",
        "I got the wrong {thing} and want the right one for it.",
    ),
    "account": (
        "My password is not accepted any more.",
        "I have a new e-mail address, how do I update it on your site?",
        "Please remove my data, I do not want to be registered any longer.",
        "The login page tells me that the user does not exist.",
        "A stranger in {place} got into my profile.",
    ),
    "technical": (
        "Since {day} my {thing} will not start.",
        "A red light blinks on the {thing}, what does it mean?",
        "The {thing} cannot find my wireless network.",
        "My {thing} gets very hot and switches itself off.",
        "What must I do to install the new software on the {thing}?",
    ),
    "sales": (
        "I am looking for a {thing} as a present, what can you suggest?",
        "How much would {n} of the {thing} cost for our school?",
        "Will there be a cheaper {thing} soon?",
        "Is the {thing} also available in a larger size?",
        "Before I order the {thing}: is it better than the {other}?",
    ),
}


def ticket_rows(templates: Mapping[str, tuple[str, ...]], count: int, seed: int) -> list[dict[str, Any]]:
    """Write `count` different tickets from templates, each team as often as the others, as rows of a data set."""
    draw, seen, rows = random.Random(f"tickets {seed}"), set(), list[dict[str, Any]]()  # noqa: S311 - no secret.
    while len(rows) < count:
        team = TEAMS[len(rows) % len(TEAMS)]
        template = draw.choice(templates[team])
        thing, other = draw.sample(THINGS, 2)
        filled = template.format(
            thing=thing, other=other, place=draw.choice(PLACES), day=draw.choice(DAYS), n=draw.randint(2, 90)
        )
        text = draw.choice(OPENINGS) + filled + draw.choice(ENDINGS).format(name=draw.choice(NAMES))
        if text in seen:
            continue
        seen.add(text)
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": team}]
        rows.append({"task": "classify", "label": team, "messages": turns, "slice": team, "session": template})
    return rows


def write_tickets(folder: Path, *, train: int = 480, heldout: int = 240, seed: int = 0) -> str:
    """Write the tickets as an exported dataset and return its digest. Tickets of one sentence count as one session."""
    return write_dataset(
        folder,
        {"train": ticket_rows(TRAIN, train, seed), "heldout": ticket_rows(HELDOUT, heldout, seed + 1)},
        name="tickets",
        version=f"{train}+{heldout}-seed{seed}",
        task="classify",
        labels=list(TEAMS),
        recipe={"made_by": "finetune.tickets", "seed": seed},
        parent=None,
        licence="Apache-2.0",
    )
