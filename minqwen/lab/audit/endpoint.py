"""The audit of an endpoint: what it says of texts first, then what it says in chats.

Texts show whether the model is right. Chats show besides whether the endpoint makes the prompt of a
chat as the model's own template does.
"""

from __future__ import annotations

from minqwen.lab.audit.audit import Report, audit
from minqwen.lab.audit.client import Endpoint
from minqwen.lab.audit.evidence import Original
from minqwen.lab.audit.explain import Among
from minqwen.lab.audit.questions import TEXT, Answers, ask


def audit_endpoint(
    endpoint: Endpoint,
    original: Original,
    claimed: str = "bfloat16",
    *,
    name: str | None = None,
    text: str = TEXT,
    among: Among = "all",
) -> Report:
    """Ask, and judge the answers. Raises MinqwenError for an endpoint that cannot be asked."""
    answers = ask(endpoint, original, name, text)
    report = judged_together(original, answers, claimed, among)
    report.offered = answers.offered or "chats"
    report.requests = endpoint.requests
    return report


def judged_together(original: Original, answers: Answers, claimed: str, among: Among) -> Report:
    differ, notes = answers.prompts_differ, answers.notes
    if not answers.chats:
        return audit(
            original, answers.texts, claimed, among=among, notes=notes, prompts_differ=differ
        )
    texts = audit(original, answers.texts, claimed, among=among, notes=notes)
    if texts.verdict == "diverge":
        return texts
    of_chats: Among = "prompts" if texts.verdict == "agree" and among == "all" else among
    chats = audit(
        original, answers.chats, claimed, among=of_chats, notes=notes, prompts_differ=differ
    )
    if chats.verdict == "diverge" or texts.verdict == "refused":
        if texts.verdict == "agree":
            chats.notes.append(f"this is of the chats; of texts the endpoint {texts.sentence}")
        return chats
    judged = "are too few to judge its template" if chats.verdict == "refused" else chats.sentence
    texts.notes.append(f"chats: {judged}")
    return texts
