"""`transformers-liquid evaluate`"""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from . import options


@options.shared(options.Running)
def evaluate(
    benchmarks: Annotated[list[str] | None, Argument(help="vqav2, gqa, textvqa, pope, mme.")] = None,
    data: Annotated[Path | None, Option(help="The folder with the benchmarks' files, as they are published.")] = None,
    output: Annotated[
        Path | None, Option(help="The folder of the run. The same command goes on where it stopped.")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="Only questions about that many pictures of each.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Questions at once.")] = 1,
    max_new_tokens: options.MaxNewTokens = 128,
    as_paper: Annotated[bool, Option("--as-paper", help="By the paper's settings; shows its numbers too.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None, Option(help="results.json of two runs: differences on the same questions.")
    ] = None,
    **given: Any,
) -> None:
    """Asks the questions of benchmarks, and says what the answers are worth, with intervals.

    \b
    Example:
      transformers-liquid evaluate vqav2 pope --data benchmarks --output results --limit 100
    """
    if compare is not None:
        if benchmarks or data or output:
            raise ValueError("--compare reads two runs that are there: leave out benchmarks, --data and --output.")
        from transformers_liquid.evaluation.run import compare as compare_runs
        from transformers_liquid.evaluation.run import table

        print(table(compare_runs(*compare)))
        return
    if not benchmarks or data is None or output is None:
        raise ValueError("Give benchmarks, --data and --output; or --compare and results.json of two runs.")
    if given["seed"] is not None:
        raise ValueError("Answers are greedy, nothing is drawn by chance: leave out --seed.")
    if as_paper and (given["dtype"], limit, batch_size, max_new_tokens) != ("auto", None, 1, 128):
        raise ValueError(
            "--as-paper is float16, all questions, one at a time, up to 128 tokens: leave out --dtype, --limit, "
            "--batch-size and --max-new-tokens."
        )
    options.check_writable(output, folder=True)
    from transformers_liquid.evaluation.benchmarks import BENCHMARKS, read_samples
    from transformers_liquid.evaluation.run import evaluate as evaluate_model
    from transformers_liquid.evaluation.run import table

    from .models import load
    from .pictures import identity

    if unknown := [name for name in benchmarks if name not in BENCHMARKS]:
        raise ValueError(f"No benchmark is called {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}.")
    benchmarks = list(dict.fromkeys(benchmarks))
    for name in benchmarks:
        read_samples(name, data, limit)  # before the model, which takes long
    pipe = load(given["model"], given["device"], "float16" if as_paper else given["dtype"])
    results = evaluate_model(pipe, benchmarks, data, output, identity(pipe), limit, batch_size, max_new_tokens)
    print(table({name: results[name]["measures"] for name in benchmarks}, paper=as_paper))
    print(output / "results.json")
