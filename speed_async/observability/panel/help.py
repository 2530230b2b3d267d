"""Help text of the panel: rows and keys."""

from rich.text import Text

from speed_async.observability.panel.layout import LABEL, Layout, wrapped

KEYS = (
    ("h or ?", "show this help, page by page; the panel follows the last page"),
    ("s", "toggle the latest three samples"),
    ("q", "close the panel; the run continues"),
    (
        "Ctrl-C",
        "in the terminal of `speed-async train`: stop the run and save a checkpoint",
    ),
)
ROWS = (
    ("updates", "updates (batches) done and in total; the phase of the run"),
    ("time", "duration of the run over all attempts; remaining time at the current rate; delay of "
     "the service loop, in red if the service is overloaded"),
    ("stage", "activity of the run before, between and after updates"),
    ("actors", "connected actors, of the expected number; the share of their slots that generate a "
     "completion, mean of the last 10 s"),
    ("reward", "pass rate of screened prompts, before the gate"),
    ("accuracy", "accuracy of the last evaluation on held-out prompts"),
    ("generated", "tokens per second sampled by all actors"),
    ("trained", "tokens per second trained by the learner"),
    ("gate", "share of screened prompts that were continued to a full group"),
    ("buffer", "finished groups that wait for the learner, and the capacity"),
    ("in flight", "prompts that actors process now. The limit varies: it is the remaining capacity "
     "of the buffer and of the batches within the staleness bound, and it grows when the gate "
     "continues fewer prompts"),
    ("staleness", "policy versions between sampling and training of a token: mean, maximum, bound"),
    ("weights", "actors with the newest version; the longest pause of an actor to load a version; "
     "the largest lag of an actor in versions"),
    ("bound by", "the main bottleneck of the learner; below, the time of its last updates"),
    ("ledger", "whether every generated token is accounted for"),
    ("actor-N", "the version of the actor, and its lag"),
    ("last", "recent events, newest first, with the run time"),
    ("! ...", "a warning, shown while it is active; it stays in the list above"),
    ("✗ ...", "a diagnosis: why the run cannot learn, and the remedy"),
)  # fmt: skip


def help_pages(layout: Layout, height: int | None) -> list[list[Text]]:
    """Split the help into pages of at most `height` lines."""
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
