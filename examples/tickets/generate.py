"""Writes the example data: tickets to the support desk of an imaginary bicycle shop, in six classes.

Every text is put together from hand-written pieces: an opening, a situation, a request, a closing. A pair of situation
and request is used once in all the files, so no row of one split is a row of another with a word changed. Some
situations touch two classes, some rows are only a few words, and some are typed in a hurry: they keep the task honest.

    python examples/tickets/generate.py
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {"unlabeled": 1500, "validation": 240, "test": 360}
SEED = 20
MOST_ALIKE = 0.65
"""Of two rows in different splits, the words they share as a part of the words they have."""

SLOTS = {
    "product": [
        "city bike", "gravel bike", "child seat", "cargo trailer", "helmet", "rear light", "front light", "saddle",
        "pannier bag", "rain jacket", "pair of gloves", "floor pump", "folding lock", "chain lock", "bike computer",
        "set of mudguards", "pedals", "phone holder", "kids' bike", "e-bike battery", "winter tyre", "frame bag",
        "cycling shoes", "bottle cage", "bell", "handlebar grips", "balance bike", "touring bike", "repair stand",
    ],
    "days": ["two days", "three days", "five days", "a week", "ten days", "almost two weeks", "three weeks", "a month"],
    "weekday": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"],
    "amount": ["14.90", "24.50", "39.00", "54.95", "79.90", "119.00", "249.00", "389.00", "1,299.00", "1,849.00"],
    "order": ["#20418", "#20977", "#21305", "#21760", "#22019", "#22584", "#23150", "#23871", "#24406", "#25093"],
    "place": ["Bergen", "Leeds", "Ghent", "Lyon", "Porto", "Graz", "Aarhus", "Utrecht", "Turin", "Malmö", "Brno"],
    "month": ["January", "March", "April", "June", "July", "September", "October", "December"],
    "person": ["my son", "my daughter", "my husband", "my wife", "my neighbour", "a colleague", "my mother"],
}  # fmt: skip

OPENINGS = [
    "", "", "", "", "", "Hello,", "Hi,", "Hi there,", "Good morning,", "Dear support team,", "Good evening,", "Hey,",
    "Hello again,", "To whom it may concern,", "Second message from me:", "Quick question:", "Sorry to bother you,",
    "I am writing about order {order}.", "Regarding order {order}:", "I am a long-time customer.",
    "This is my first purchase with you.", "I tried to call but nobody picked up.",
]  # fmt: skip
CLOSINGS = [
    "", "", "", "", "", "", "Thanks!", "Thank you.", "Many thanks in advance.", "Best regards", "Kind regards, {name}",
    "Cheers, {name}", "I look forward to your answer.", "Please reply soon.", "I am getting impatient.",
    "You can reach me in the evening.", "Greetings from {place}.", "Otherwise I am happy with you.",
]  # fmt: skip
NAMES = ["Ana", "Jonas", "Mireille", "Tom", "Ingrid", "Pavel", "Lucia", "Femke", "Sam", "Niamh", "Oskar", "Rita"]

SITUATIONS = {
    "delivery": [
        "The tracking page has shown the same status for {days}.",
        "My {product} was meant to arrive on {weekday} and there is still no sign of it.",
        "The courier says the parcel was handed over, but nobody in the house has it.",
        "I ordered on {weekday} and have heard nothing since the confirmation mail.",
        "The box arrived soaked and torn open on one side.",
        "Only one of the two boxes reached me; the one with the {product} is missing.",
        "I am moving to {place} next week and the {product} has not left your warehouse yet.",
        "The driver left the {product} in front of the door in the rain.",
        "According to the app the parcel is in {place}, which is nowhere near me.",
        "I need the {product} for a trip that starts on {weekday}.",
        "I was at home all day and still found a card saying I was not in.",
        "The pickup station sent my parcel back before I could get there.",
        "I got somebody else's parcel; the label says an address in {place}.",
        "The shipping mail has a tracking number that the carrier does not know.",
        "I typed the wrong house number when I ordered the {product}.",
        "The delivery window has now been moved for the third time.",
        "I paid extra for express and it has been {days}.",
        "Customs in {place} is holding the parcel and asks for papers.",
        "Nobody rang the bell, although I had chosen delivery with an appointment.",
        "I would like the {product} to go to my office instead of my home.",
        "The carrier wants a signature, but I work on weekdays.",
        "My order is split and I do not see when the second part with the {product} comes.",
        "It says delivered on {weekday}, and I have searched the whole stairwell.",
        "The freight company promised to call before bringing the bike and never did.",
        "My {product} was for a birthday in {month}, and the parcel is still on its way.",
        "I do not want the money back, I just want the {product} I ordered {days} ago to turn up.",
        "My account says shipped, yet the carrier has not received anything.",
        "A neighbour I do not know is said to have taken my parcel.",
        "You charged for shipping to {place}, but the parcel went to my old town.",
        "The outer box was crushed, the {product} inside seems fine though.",
    ],
    "returns": [
        "The {product} looks different from the photos and I do not want to keep it.",
        "I ordered two sizes of the {product} and one of them can go back.",
        "I sent the {product} back {days} ago and have not heard anything.",
        "The {product} was a gift for {person} who already has one.",
        "The return label is not in the box.",
        "I changed my mind about the {product}, it is still unopened.",
        "Your return form does not accept order {order}.",
        "I dropped the parcel at the post office on {weekday}, and the refund is still open.",
        "I would rather have the blue {product} than the red one I received.",
        "I missed the return period by {days} because I was in hospital.",
        "You refunded {amount} but the {product} cost more than that.",
        "The {product} is too small for {person}.",
        "I threw away the original packaging of the {product}.",
        "You sent a {product} although I had ordered something else.",
        "I would like to give back the {product} that I bought in your store in {place}.",
        "The exchange I asked for has not been confirmed yet.",
        "I have tried on the {product} twice at home and it is simply not comfortable.",
        "Half of my order {order} I want to keep, the other half not.",
        "The courier refuses to collect the bike I am sending back.",
        "I returned the {product} without the form because the printer was broken.",
        "The store credit for my returned {product} has not shown up.",
        "My {product} came later than promised, so I bought one elsewhere and no longer need yours.",
        "I was promised my money back within {days}, that was in {month}.",
        "The {product} was on sale; I am not sure whether sale items can go back.",
        "I want to swap my {product} for the next larger size.",
        "The colour of the {product} does not match my bike at all.",
        "Your warehouse says my returned box was empty, which is not true.",
        "I have two identical {product} deliveries and need only one of them.",
        "The refund went to a card that I closed in {month}.",
        "I never took the {product} out of its bag and I do not need it any more.",
    ],
    "billing": [
        "My card was charged twice for order {order}.",
        "The invoice for the {product} has the wrong company name on it.",
        "I was billed {amount} although the shop said the price was lower.",
        "The discount code from your newsletter was not taken off at the checkout.",
        "Your reminder asks for {amount}, but I paid that in {month}.",
        "The payment page stops with an error when I enter my credit card.",
        "I need a proper receipt with VAT for my tax office.",
        "I wanted to pay by invoice, and this choice is not offered to me.",
        "My bank shows a debit of {amount} that I cannot connect to any order.",
        "The leasing company needs a pro forma for the bike from you.",
        "I cancelled order {order} the same evening, yet the amount was taken.",
        "I used a gift voucher of {amount} and it was not counted.",
        "The second instalment was collected earlier than agreed.",
        "PayPal says complete, your shop says the payment is open.",
        "You added a shipping fee of {amount} although the order was above the limit.",
        "The invoice still shows my old address in {place}.",
        "I got a dunning letter for a {product} that I never ordered.",
        "The transfer went to your old bank account because the mail named it.",
        "The sales tax for a company in {place} looks wrong to me.",
        "My employer pays for the {product} and wants the bill in its own name.",
        "The price of the {product} went down by {amount} a day after I had bought it.",
        "My credit card expired in {month} and the next instalment is due.",
        "The total in the confirmation is not the total on my statement.",
        "I would like to pay the {product} in several parts.",
        "Your system put the payment on hold and does not say why.",
        "The pdf with the bill does not open on my computer.",
        "I paid for a membership with free shipping and was charged for shipping again.",
        "The voucher that {person} gave me is said to have expired.",
        "The exchange rate on my bill is far from that of the day.",
        "My bank needs to know why {amount} was reserved and not booked.",
    ],
    "account": [
        "I cannot sign in any more since {weekday}.",
        "The mail for setting a new password never arrives.",
        "I would like to use another e-mail address than the one I signed up with.",
        "Somebody seems to have logged in to my profile from {place}.",
        "Please stop sending me the newsletter, the link at the bottom does nothing.",
        "My profile shows the orders of a person I do not know.",
        "The code for the second step of the login comes too late and is then invalid.",
        "I have two profiles by accident, one with each of my addresses.",
        "Your site says my e-mail address is already taken.",
        "I want all the data you hold about me to be deleted.",
        "The app logs me out every time I close it.",
        "My last name changed in {month} and the profile does not let me edit it.",
        "After the update of the app my wish list with the {product} is empty.",
        "My profile is locked after too many attempts.",
        "I ordered the {product} as a guest and would now like to see it in a profile.",
        "I signed up with Google and have no password that I could enter.",
        "The captcha on the sign-in page does not load in my browser.",
        "I get text messages from you that were meant for {person}.",
        "My loyalty points are gone since I renewed my password.",
        "The birthday in my profile is wrong and greyed out.",
        "The confirmation link in your welcome mail has run out.",
        "I cannot get to my invoices because the password is refused.",
        "The shop shows everything in French since I logged in from {place}.",
        "I would like to know which personal details you have stored about me.",
        "Our family shares one profile and {person} should no longer have access.",
        "I lost the phone that I used to confirm my logins.",
        "Since {days} the site only tells me that my session has ended.",
        "I never agreed to advertising by post and get it all the same.",
        "I would like to close my profile, I have given up cycling.",
        "Every time I save a new delivery address in my profile, it is gone the next day.",
    ],
    "product_advice": [
        "I am 1.62 m tall and unsure about the frame size of the touring bike.",
        "I am looking for a {product} for {person}.",
        "I wonder whether the {product} fits a bike with disc brakes.",
        "I cannot find the weight of the {product} anywhere on your page.",
        "I would like a lock that insurance companies in {place} accept.",
        "Two of your helmets look the same to me apart from the price.",
        "I ride 20 kilometres to work in all weathers and need good lights.",
        "The {product} I want has been sold out for {days}.",
        "Before I buy the child seat I need to know up to what age it can be used.",
        "I have wide feet and am thinking of the cycling shoes.",
        "The description does not say whether the rain jacket is really waterproof.",
        "I am choosing between a hub motor and a mid motor for hills like those around {place}.",
        "My bike has an old 26 inch wheel, and I see tyres only in 28 inch.",
        "I would like to see the {product} before I buy it.",
        "I have read good things about the gravel bike but have never ridden one.",
        "I am not sure if the battery may be taken on a plane.",
        "The cargo trailer has to carry a dog of 30 kilos.",
        "The pannier bag should fit a laptop of 15 inches.",
        "I am vegan and would like to know what the saddle is made of.",
        "{person} wants to learn cycling at the age of four.",
        "I need a pump that works with both kinds of valves.",
        "The phone holder should also take a phone in a thick case.",
        "I would spend up to {amount} on a {product}.",
        "I plan a tour of {days} through the mountains with luggage.",
        "I see a model of last year and one of this year and no difference between them.",
        "I wonder how far the e-bike goes on one charge in winter.",
        "My old {product} was from another brand and lasted ten years; I want something like it.",
        "I return so many helmets because they press on my forehead that I want to ask before I order the next one.",
        "I would like to put the {product} on my son's bike, which has 20 inch wheels.",
        "For my small flat I need a bike that folds.",
    ],
    "repair": [
        "The {product} broke after {days} of normal use.",
        "The battery of my e-bike goes down from full to half within minutes.",
        "The gears jump whenever I pedal hard.",
        "There is a crack in the frame near the bottom bracket.",
        "The front brake squeals and hardly brakes in the wet.",
        "The display of the bike computer stays black since {weekday}.",
        "A spoke of the rear wheel breaks for the third time.",
        "The zip of the rain jacket came off.",
        "I need a new key cylinder for my folding lock.",
        "The rear light gets water inside and no longer switches on.",
        "The motor makes a grinding noise above 15 km/h.",
        "A screw for fixing the {product} was lost and I need the same one.",
        "The {product} that you repaired in {month} has the same fault again.",
        "The seat post slides down while I am riding.",
        "The plastic clip on the child seat snapped.",
        "The bearing in the pedals has a lot of play after {days}.",
        "The chain came off and now the wheel is stuck.",
        "The charger gets very hot and smells burnt.",
        "The paint is coming off the handlebar although it is not a year old.",
        "My {product} stopped working just before the guarantee ends in {month}.",
        "The floor pump does not hold the pressure any more.",
        "The front wheel has had a wobble since the first ride.",
        "The update of the motor failed and the e-bike does not start.",
        "The sole of the cycling shoes has come unstuck.",
        "The strap of the helmet tore when I closed it.",
        "The kickstand bent under the weight of the bike.",
        "My bike creaks at every turn of the crank, I paid {amount} for it.",
        "The buckle of the pannier bag does not close any more, so it fell off on the road.",
        "The left brake lever lost oil all over my floor.",
        "I have had the {product} since {month} and a part inside rattles.",
    ],
}

REQUESTS = {
    "delivery": [
        "Where is it now?", "When can I expect it?", "Can you ask the carrier what happened?",
        "Please have it sent to another address.", "Could it come on a Saturday?", "Can you send it again?",
        "Is it lost?", "Can I pick it up somewhere myself?", "Please give me a date I can rely on.",
        "Could you speed this up?", "Will somebody get in touch with me about the new date?",
        "What do I have to tell the driver?",
    ],
    "returns": [
        "How do I send it back?", "When do I get my money?", "Can I have it exchanged?", "Please send me a label.",
        "Has it reached you?", "Do I have to pay for the way back?", "Can you take it back all the same?",
        "Will I get the full price?", "Can I hand it in at a store?", "Please confirm that the refund is on its way.",
        "What should I write on the form?", "Could somebody collect it?",
    ],
    "billing": [
        "Please correct the invoice.", "Can you check the payment?", "Why was I charged this?",
        "I expect the difference to be credited.", "Please send me a new bill.", "Which amount is right?",
        "Can I still change how I pay?", "Please stop the reminders.", "Could your accounts department look at this?",
        "Is there a way to have it deducted afterwards?", "Can you send me a copy for my records?",
        "Do I have to pay this?",
    ],
    "account": [
        "How do I get back in?", "Please reset it for me.", "Can you change that for me?", "Please delete it.",
        "Who has access to my data?", "Can you unlock it?", "Is my data safe?", "Where can I switch that off?",
        "Can the two be merged?", "Please confirm once it is done.", "What do you need from me to prove who I am?",
        "Does this have something to do with your new website?",
    ],
    "product_advice": [
        "Which one would you recommend?", "Would that work?", "Does it fit?", "Which size do I need?",
        "Will you have it again soon?", "Is it worth the price?", "What is the difference?",
        "Do you have it in the store?", "What would you take?", "Is there something more suitable?",
        "Are there any tests of it?", "Can one try it somewhere?",
    ],
    "repair": [
        "Is this covered by the warranty?", "Can you repair it?", "Where do I get the spare part?",
        "Can I fix that myself?", "Is it still safe to ride?", "What would the repair cost?",
        "Can I bring it to your workshop?", "Please send me a replacement part.", "How long does a repair take?",
        "Is this a known fault?", "What could be the reason?", "Can a mechanic look at it?",
    ],
}  # fmt: skip
NEUTRAL_REQUESTS = ["Can you help?", "What can I do?", "Please advise.", "", "", "That cannot be right.", "What now?"]

SHORT = {
    "delivery": [
        "still no parcel", "where is my order???", "parcel {order} gone since {weekday}", "Tracking dead. Any news?",
        "third day waiting at home for the driver", "wrong town on the label, please stop the parcel",
    ],
    "returns": [
        "want to send it back", "refund for {order}?", "Need a return label please", "swap for size L possible?",
        "money for the {product} still not back", "does not suit me, goes back",
    ],
    "billing": [
        "charged twice!!", "invoice {order} please", "voucher does not work", "What is this debit of {amount}?",
        "VAT number missing on the bill", "got a reminder, have paid",
    ],
    "account": [
        "cannot log in", "password mail does not come", "Unsubscribe!!!", "delete my profile please",
        "new e-mail address, how?", "app throws me out again and again",
    ],
    "product_advice": [
        "{product} again in stock when?", "which lock for an e-bike?", "frame size for 1.80 m?",
        "does the {product} fit 28 inch?", "helmet for a small head?", "need something for winter, {amount} at most",
    ],
    "repair": [
        "brakes squeal", "e-bike does not start", "{product} broken after {days}", "spare part for the {product}?",
        "gear cable snapped, warranty?", "light flickers",
    ],
}  # fmt: skip


def main() -> None:
    """Write unlabeled.jsonl, validation.jsonl and test.jsonl beside this file."""
    rows = tickets(random.Random(SEED))
    splits = divide(rows)
    for name, chosen in splits.items():
        with (HERE / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for text, label in chosen:
                row = {"text": text} if name == "unlabeled" else {"text": text, "label": label}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{name}: {len(chosen)} rows")


def tickets(rng: random.Random) -> list[tuple[str, str]]:
    """Every pair of situation and request once, and the short ones, as (text, label) in random order."""
    rows: list[tuple[str, str]] = []
    for label, situations in SITUATIONS.items():
        requests = REQUESTS[label] + NEUTRAL_REQUESTS
        pairs = [(situation, request) for situation in situations for request in requests]
        rows += [(ticket(rng, situation, request), label) for situation, request in pairs]
        rows += [(fill(rng, text), label) for text in SHORT[label]]
    rng.shuffle(rows)
    return rows


def ticket(rng: random.Random, situation: str, request: str) -> str:
    """One text, as one of many people would type it."""
    body = [situation, request] if rng.random() < 0.85 else [request, situation]
    parts = [rng.choice(OPENINGS), *body, rng.choice(CLOSINGS)]
    text = fill(rng, " ".join(part for part in parts if part))
    text = text[0].upper() + text[1:]
    text = re.sub(r"([.?!:] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    return hurried(rng, text) if rng.random() < 0.2 else text


def fill(rng: random.Random, text: str) -> str:
    """The text with a value in every slot."""
    values = {**SLOTS, "name": NAMES}
    return re.sub(r"\{(\w+)\}", lambda match: rng.choice(values[match[1]]), text)


def hurried(rng: random.Random, text: str) -> str:
    """The text without capitals or without punctuation, and with two letters exchanged."""
    text = text.lower() if rng.random() < 0.6 else re.sub(r"[.,](?= |$)", "", text)
    place = rng.randrange(len(text) - 2)
    pair = text[place : place + 2]
    return text[:place] + pair[::-1] + text[place + 2 :] if pair.isalpha() else text


def divide(rows: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Test and validation first, equally many of each label; the rest unlabeled, without what is too much like them."""
    labels = sorted(SITUATIONS)
    splits: dict[str, list[tuple[str, str]]] = {"test": [], "validation": [], "unlabeled": []}
    taken: list[set[str]] = []
    used: set[str] = set()
    for name in splits:
        room = {label: SIZES[name] // len(labels) for label in labels}
        earlier = list(taken)
        for text, label in rows:
            bag = words(text)
            if room[label] == 0 or text in used or any(alike(bag, other) > MOST_ALIKE for other in earlier):
                continue
            room[label] -= 1
            used.add(text)
            taken.append(bag)
            splits[name].append((text, label))
        assert not any(room.values()), f"{name} lacks rows: {room}"
    return splits


def words(text: str) -> set[str]:
    """The words of a text without case and punctuation."""
    return set(re.findall(r"[\w']+", text.lower()))


def alike(first: set[str], second: set[str]) -> float:
    """Jaccard's index: shared words / all words."""
    return len(first & second) / len(first | second)


if __name__ == "__main__":
    main()
