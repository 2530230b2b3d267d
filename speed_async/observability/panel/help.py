"""What every row of the panel means, and which keys it knows."""

from rich.text import Text

from speed_async.observability.panel.layout import LABEL, Layout, wrapped

KEYS = (
    ("h or ?", "this help, page by page; after the last page the panel again"),
    ("s", "the latest three samples, and back"),
    ("q", "leave the panel; the run goes on"),
    ("Ctrl-C", "in the terminal of `speed-async train`: stop the run in order, with a checkpoint"),
)
ROWS = (
    ("updates", "optimiser updates made, of all that are to be made; the phase of the run"),
    ("time", "seconds since the run began, in all its lives; what is left at the present rate; how "
     "late the service comes to its work, in red when it is too busy"),
    ("stage", "what the run does before, between and after its updates"),
    ("actors", "actors that take part, of those that are wanted; the share of their slots that "
     "generate a completion now"),
    ("reward", "pass rate of screened prompts, before the gate chooses among them"),
    ("accuracy", "of the last evaluation on held-out prompts"),
    ("generated", "tokens a second that all actors sample"),
    ("trained", "tokens a second that the learner trains on"),
    ("gate", "share of screened prompts that were continued to a whole group"),
    ("buffer", "finished groups that wait for the learner, of those that fit"),
    ("in flight", "prompts that actors work on now. The limit moves: it is what the buffer and the "
     "batches that are due within the staleness bound can still take, and it grows when the gate "
     "continues fewer prompts"),
    ("staleness", "versions between sampling a token and training on it: mean, maximum, bound"),
    ("weights", "actors that hold the newest version; the longest pause of an actor for loading "
     "one; how many versions the last actor is behind"),
    ("bound by", "what the learner waits for most; below, where the time of its last updates went"),
    ("ledger", "whether every generated token is accounted for"),
    ("actor-N", "the version that it holds, and how far that is behind"),
    ("last", "what happened, the newest first, with the time of the run"),
    ("! ...", "a warning; it goes when the matter is over, and stays in the list above"),
    ("✗ ...", "a diagnosis: why the run cannot learn, and what to change"),
)  # fmt: skip


def help_pages(layout: Layout, height: int | None) -> list[list[Text]]:
    """The help in pages of at most `height` lines."""
    entries = [_entry(name, text, layout) for name, text in (*KEYS, *ROWS)]
    pages: list[list[Text]] = [[]]
    for entry in entries:
        if height is not None and pages[-1] and len(pages[-1]) + len(entry) > height:
            pages.append([])
        pages[-1] += entry
    return pages


def _entry(name: str, text: str, layout: Layout) -> list[Text]:
    first, *others = wrapped(text, layout.inner, first=" " * LABEL, rest=" " * LABEL)
    head = Text(name.ljust(LABEL), "bold", no_wrap=True).append(first[LABEL:], "not bold")
    return [head, *(Text(line, no_wrap=True) for line in others)]
