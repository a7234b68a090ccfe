"""`transformers-liquid evaluate`"""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from . import options


@options.shared(options.Drawn, options.Running)
def evaluate(
    benchmarks: Annotated[
        list[str] | None,
        Argument(help="emoji, vqav2, gqa, textvqa, pope, mme, loss, folder, mjhq, genai-bench, wise, language."),
    ] = None,
    data: Annotated[Path | None, Option(help="The folder with the benchmarks' files, as they are published.")] = None,
    output: Annotated[Path | None, Option(help="A folder; the same command goes on where it stopped.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Only what is about that many pictures of each.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Questions, or pictures drawn, at once.")] = 1,
    max_new_tokens: options.MaxNewTokens = 128,
    features: Annotated[
        str | None, Option(help="For folder, mjhq: inception, a file of it, codec, or an image model.")
    ] = None,
    judge: Annotated[
        str | None, Option(help="genai-bench: a model, self; wise: openai:MODEL; scores:FILE; emoji: a classifier.")
    ] = None,
    as_paper: Annotated[bool, Option("--as-paper", help="By the paper's settings; shows its numbers too.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None, Option(help="results.json of two runs: differences on the same questions.")
    ] = None,
    **given: Any,
) -> None:
    """Asks the questions of benchmarks, or draws for them, and says what that is worth, with intervals.

    \b
    Example:
      transformers-liquid evaluate vqav2 pope --data benchmarks --output results --limit 100
    """
    if compare is not None and (benchmarks or data or output):
        raise ValueError("--compare reads two runs that are there: leave out benchmarks, --data and --output.")
    if compare is None and (not benchmarks or (data is None and benchmarks != ["emoji"]) or output is None):
        raise ValueError("Give benchmarks, --data and --output; or --compare and results.json of two runs.")
    from transformers_liquid.evaluation import run
    from transformers_liquid.evaluation.benchmarks import TASKS, check_benchmarks, read_samples
    from transformers_liquid.generation.settings import DEFAULT_IMAGE_GENERATION_CONFIG

    from .models import load
    from .pictures import Drawing

    if compare is not None:
        print(run.table(run.compare(*compare)))
        return
    data = Path(run.__file__).parent if data is None else data  # the tasks of emoji, without pictures
    benchmarks = list(dict.fromkeys(one for name in benchmarks for one in (TASKS if name == "language" else [name])))
    set_here = {name for name, value in given.items() if value not in (None, False)} - {"model", "device", "dtype"}
    kinds = check_benchmarks(benchmarks, {"judge": judge, "features": features})
    if set_here and not kinds & {"judge", "features", "emoji"}:
        raise ValueError(f"Answers are greedy, nothing is drawn: leave out {', '.join(sorted(set_here))}.")
    is_plain = (given["dtype"], limit, max_new_tokens, set_here - {"seed"}) == ("auto", None, 128, set())
    if as_paper and not (is_plain and (batch_size == 1 or "answers" not in kinds)):
        raise ValueError(
            "--as-paper is all in float16, questions one by one, answers of 128 tokens: leave out what differs."
        )
    options.check_greedy(given)
    options.check_resumable(output)
    for name in benchmarks:
        read_samples(name, data, limit)  # before the model, which takes long
    pipe = load(given["model"], given["device"], "float16" if as_paper else given["dtype"])
    drawing = Drawing(pipe, given | (DEFAULT_IMAGE_GENERATION_CONFIG if as_paper else {}))
    settings = drawing.shared | drawing.settings | {"seed": given["seed"] or 0}
    how = (limit, batch_size, max_new_tokens, settings, judge, features)
    results = run.evaluate(pipe, benchmarks, data, output, drawing.identity, *how)
    print(run.table({key: of["measures"] for key, of in results.items()}, paper=as_paper))
    for key, of in results.items():
        if without := of.get("without_score"):
            print(f"{key}: {len(without)} pictures have no score, such as {without[0]}.")
    print(output / "results.json")
