"""Groups of rollouts as HTML: who wrote what, which tokens were trained on, what was retrieved, what was
earned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.report_page.text import element, plain
from megatron_sd.records import StopReason

Record = Mapping[str, Any]  # observability.transcripts.group_record, as JSON brings it back
# (a rollout's record, its question's) -> what is said of it, by the class that its article gets
Tags = Callable[[Record, Record], Mapping[str, str]]

LEGEND = (
    ("policy trained", "policy, in the loss"),
    ("observed", "environment"),
    ("block", "hindsight block, teacher only"),
)
JUDGED_LEGEND = (("more2", "likelier to the teacher"), ("less2", "less likely"))
OUTCOMES = {
    "right": "all right",
    "mixed": "mixed",
    "wrong": "all wrong",
    "failed": "no data",
}


def outcome(group: Record) -> str:
    """A key of OUTCOMES; right means exact match, and infrastructure failures do not count."""
    labels = {is_right(rollout) for rollout in group["rollouts"] if not is_failed(rollout)}
    if not labels:
        return "failed"
    return "mixed" if len(labels) == 2 else "right" if True in labels else "wrong"


def is_right(rollout: Record) -> bool:
    """Its answer matches exactly."""
    return rollout["scores"] is not None and rollout["scores"]["em"] == 1.0


def has_log_ratios(group: Record) -> bool:
    """Whether `sd-search credit` has judged a query of it."""
    return any("query_log_ratios" in turn for rollout in group["rollouts"] for turn in rollout["turns"])


def is_failed(rollout: Record) -> bool:
    """No data: the infrastructure failed."""
    return StopReason(rollout["stop_reason"]).is_infrastructure


def no_tags(rollout: Record, question: Record) -> Mapping[str, str]:
    """Nothing is said of any rollout."""
    return {}


def render_legend(groups: Sequence[Record]) -> str:
    """What the colours of these groups mean."""
    legend = "".join(element("span", plain(title), kind) for kind, title in LEGEND)
    legend += "<span><mark>query token</mark></span>"
    if any(map(has_log_ratios, groups)):
        legend += "".join(element("span", plain(title), kind) for kind, title in JUDGED_LEGEND)
    return element("div", legend, "legend")


def render_group(
    group: Record, place: str, *, trained: bool, tags: Tags = no_tags, folds: bool = False
) -> str:
    """One group, folded: a line with question, gold answers and outcomes; inside, the prompt and the
    rollouts side by side.

    trained: these rollouts went into an update, so that it can be said which tokens the loss saw. tags: what
    is said of a rollout besides. folds: observations are folded, too.
    """
    question, kind = group["question"], outcome(group)
    dots = "".join(element("i", "", f"dot {_mark(rollout)}") for rollout in group["rollouts"])
    gold = element("span", plain(" | ".join(question["golden_answers"])), "gold")
    head = f"{element('span', plain(place), 'place')}{element('b', plain(question['text']))}{gold}{element('span', dots, 'dots')}"
    prompt = group["rollouts"][0]["prompt_text"] if group["rollouts"] else ""
    shown = element("details", f"<summary>prompt</summary>{element('pre', plain(prompt), 'prompt')}")
    blocks = {rollout["hindsight"] for rollout in group["rollouts"]}
    if len(blocks) == 1:  # the teacher of every rollout saw the same one
        shown += _block(*blocks)
    own_blocks = [rollout["hindsight"] if len(blocks) > 1 else "" for rollout in group["rollouts"]]
    articles = [
        element(
            "article",
            _headline(rollout, said, in_loss=in_loss)
            + _block(own)
            + _turns(rollout, question["supporting"], in_loss=in_loss, folds=folds),
            " ".join((_mark(rollout), *said)),
        )
        for rollout, own in zip(group["rollouts"], own_blocks)
        for said in [tags(rollout, question)]
        for in_loss in [trained and not is_failed(rollout)]
    ]
    return element(
        "details",
        f"<summary>{head}</summary>{shown}{element('div', ''.join(articles), 'rollouts')}",
        f"group {kind}",
    )


def _block(text: str) -> str:
    return _segment("block", plain(text)) if text else ""


def _headline(rollout: Record, said: Mapping[str, str], *, in_loss: bool) -> str:
    """Its answer, how it ended, what is said of it and what it earned."""
    num_sampled = sum(len(turn["completion_ids"]) for turn in rollout["turns"])
    num_read = len(rollout["prompt_ids"]) + sum(len(turn["observation_ids"]) for turn in rollout["turns"])
    facts = (
        f"{rollout['stop_reason']} · {num_sampled} tokens sampled, {'in' if in_loss else 'not in'} the loss;"
        f" {num_read} read"
    )
    mark = _mark(rollout)
    answer = "none" if rollout["answer"] is None else rollout["answer"]
    title = f"{element('i', '', f'dot {mark}')} rollout {plain(rollout['index'])}: {plain(answer)}"
    told = "".join(element("span", plain(words), "tag") for words in said.values())
    return (
        f"{element('h3', title)}{element('p', plain(facts), 'facts')}{element('p', told, 'tags') if told else ''}"
        f"{_scores(rollout['scores'])}"
    )


def _turns(rollout: Record, supporting: Sequence[Sequence[str]], *, in_loss: bool, folds: bool) -> str:
    """What was written, found and read, in this order."""
    parts = []
    for turn in rollout["turns"]:
        if turn["completion_ids"]:
            parts.append(_segment("policy trained" if in_loss else "policy", _completion(turn)))
        if turn["query"] is not None:
            parts.append(_hits(turn["hits"], supporting))
        if turn["observation_text"]:
            observed = _segment("observed", plain(turn["observation_text"]))
            parts.append(
                element("details", f"<summary>observation</summary>{observed}", "fold") if folds else observed
            )
    return "".join(parts)


def _mark(rollout: Record) -> str:
    return "failed" if is_failed(rollout) else "right" if is_right(rollout) else "wrong"


def _segment(kind: str, content: str) -> str:
    return element("pre", content, f"segment {kind}")


def _completion(turn: Record) -> str:
    """The completion's text, its query tokens marked: those that self-distillation works on."""
    if "query_parts" not in turn:
        return plain(turn["completion_text"])
    before, query, after = map(plain, turn["query_parts"])
    if "query_log_ratios" in turn:
        query = "".join(map(_judged, turn["query_tokens"], turn["query_log_ratios"]))
    return f"{before}{element('mark', query)}{after}"


def _judged(token: str, log_ratio: float) -> str:
    """A query token in the colour of what the teacher makes of it: up to three steps of half a nat, more or
    less likely."""
    depth = min(3, round(abs(log_ratio) / 0.5))
    kind = f"{'more' if log_ratio > 0 else 'less'}{depth}" if depth else "same"
    return f'<span class="{kind}" title="teacher {log_ratio:+.2f} nats">{plain(token)}</span>'


def _scores(scores: Mapping[str, Any] | None) -> str:
    """Of a rollout's record; each attempt's exact match by itself, where there are several, and each score of
    the user's own."""
    ours = dict(scores or {})
    attempts, own = ours.pop("em_by_attempt", ()), ours.pop("own", {})
    known = {name: value for name, value in (ours | own).items() if value is not None}
    known |= {f"em attempt {number}": em for number, em in enumerate(attempts, start=1)}
    cells = "".join(
        f"<div><dt>{plain(name.replace('_', ' '))}</dt><dd>{value:.3g}</dd></div>"
        for name, value in known.items()
    )
    return element("dl", cells, "scores")


def _hits(hits: Sequence[Record], supporting: Sequence[Sequence[str]]) -> str:
    if not hits:
        return element("p", "no passage found", "facts")
    rows = []
    for hit in hits:
        passage = hit["passage"]
        hops = [str(number) for number, ids in enumerate(supporting, start=1) if passage["id"] in ids]
        needed = element("em", f"hop {' and '.join(hops)}") if hops else ""
        title = f"{element('code', plain(passage['id']))} {plain(passage['title'])}"
        score = element("span", f"{hit['score']:.2f}", "score")
        rows.append(element("li", f"{title} {score} {needed}"))
    return element("ol", "".join(rows), "hits")
