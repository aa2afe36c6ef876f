"""How well unknown classes are found and counted: every method of `discover`, and its peers, over many draws.

python benchmarks/discovery/quality.py [--sets digits facts] [--draws 5-9] [--methods communities kmeans] [--json FILE]

A method by its name has the references; 'told' has them and the number of unknown classes; 'alone' has neither.
Peers are k-means (scikit-learn), told the number, and EVoC and fast-hdbscan as they come, where they are installed.

Figures are means over the draws (data.py), over all items handed in: items of unknown classes (New) and wrongly
rejected known ones (Old). Accuracy pairs groups with classes once, over all of them (GCD's "v2"); an item that is left
out because it lies among known ones counts as of the class of its nearest reference in the gallery, noise as wrong.
`found` is the number of proposed classes, `true` that of the unknown ones, `error` the mean of |found − true| / true.

The classes of a set are about equally large. In a set named '…-uneven' the unknown ones are thinned, down to an eighth:
a rule that weighs groups by their size looks good only without that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import faiss
import numpy as np
from data import SETS, Draw, draw, uneven
from sklearn.cluster import KMeans
from tqdm import tqdm

from osml_plugin.discovery import discover
from osml_plugin.discovery.methods import names
from osml_plugin.errors import OsmlError
from osml_plugin.metrics import discovery_metrics

FACTS_DRAWS = range(2)
UNEVEN = "-uneven"
"""Ends the name of a set whose unknown classes are made of uneven sizes."""
ALL_SETS = [*SETS, "facts", *(name + UNEVEN for name in SETS)]
Grouping = Callable[[Draw], np.ndarray]
"""From a draw to the found class `(N,)` of each item, −1: left out."""


def ways(methods: list[str]) -> dict[str, Grouping]:
    """What is compared, by the name of its row."""
    found: dict[str, Grouping] = {}
    for method in methods:
        if method in PEERS:
            module, peer = PEERS[method]
            if find_spec(module):
                found[method] = peer
            else:
                tqdm.write(f"{method} is not installed")
            continue
        found[method] = lambda d, method=method: discover(d.items, **references(d), method=method).labels
        found[f"{method}, told"] = lambda d, method=method: (
            discover(d.items, **references(d), method=method, n_classes=d.n_unknown).labels
        )
        found[f"{method}, alone"] = lambda d, method=method: discover(d.items, method=method).labels
    return found


def references(d: Draw) -> dict[str, np.ndarray]:
    return {"known_embeddings": d.references, "known_labels": d.reference_classes, "in_gallery": d.in_gallery}


def kmeans(d: Draw) -> np.ndarray:
    return KMeans(d.n_unknown, n_init=3, random_state=0).fit_predict(d.items)


def evoc(d: Draw) -> np.ndarray:
    from evoc import EVoC

    return EVoC(random_state=0).fit_predict(d.items)


def fast_hdbscan(d: Draw) -> np.ndarray:
    from fast_hdbscan import HDBSCAN

    return HDBSCAN().fit_predict(d.items)


PEERS = {
    "k-means, told": ("sklearn", kmeans),
    "EVoC": ("evoc", evoc),
    "fast-hdbscan": ("fast_hdbscan", fast_hdbscan),
}


def figures(d: Draw, found: np.ndarray, has_references: bool) -> dict[str, float]:
    n_found = int(found.max()) + 1
    if has_references:
        gallery, gallery_classes = d.references[d.in_gallery], d.reference_classes[d.in_gallery]
        left_out = found == -1
        if left_out.any():
            nearest = faiss.knn(d.items[left_out], gallery, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]
            found = found.copy()
            found[left_out] = n_found + gallery_classes[nearest]
    metrics = discovery_metrics(d.classes, found, d.is_old)
    return {
        "All": metrics.accuracy,
        "Old": metrics.accuracy_old,
        "New": metrics.accuracy_new,
        "NMI": metrics.nmi,
        "B3 F": metrics.bcubed_f1,
        "found": n_found,
        "true": d.n_unknown,
        "error": abs(n_found - d.n_unknown) / d.n_unknown,
    }


def table(rows: list[dict]) -> str:
    """Means over the draws, one line a way."""
    columns = {
        "All": ".3f", "Old": ".3f", "New": ".3f", "NMI": ".3f", "B3 F": ".3f", "found": ".1f", "true": ".1f",
        "error": ".2f", "seconds": ".2f",
    }  # fmt: skip
    lines = [f"{'':<30}" + "".join(f"{column:>8}" for column in columns)]
    for way in dict.fromkeys(row["way"] for row in rows):
        of_way = [row for row in rows if row["way"] == way]
        refused = [row["refused"] for row in of_way if "refused" in row]
        if refused:
            lines.append(f"{way:<30}  {refused[0]}")
        else:
            means = ((np.mean([row[column] for row in of_way]), form) for column, form in columns.items())
            lines.append(f"{way:<30}" + "".join(f"{mean:>8{form}}" for mean, form in means))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=ALL_SETS, choices=ALL_SETS)
    parser.add_argument("--draws", default="0-4", help="first and last draw (facts has 0 and 1, whatever this says)")
    parser.add_argument("--methods", nargs="+", default=[*names(), *PEERS], choices=[*names(), *PEERS])
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where draws are kept, which take minutes to make")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of each draw")
    arguments = parser.parse_args()
    first, last = (int(end) for end in arguments.draws.split("-"))
    compared = ways(arguments.methods)
    rows = []
    for name in arguments.sets:
        numbers = FACTS_DRAWS if name == "facts" else range(first, last + 1)
        bar = tqdm(total=len(numbers) * len(compared), desc=name)
        for number in numbers:
            d = draw(name.removesuffix(UNEVEN), number, arguments.cache)
            d = uneven(d, number) if name.endswith(UNEVEN) else d
            for way, group in compared.items():
                row = {"set": name, "draw": number, "way": way, "items": len(d.items)}
                start = perf_counter()
                try:
                    found = group(d)
                    seconds = perf_counter() - start
                    referred = way.removesuffix(", told") in names()
                    row |= figures(d, found, has_references=referred) | {"seconds": seconds}
                except OsmlError as error:
                    row["refused"] = str(error)
                rows.append(row)
                bar.update()
        bar.close()
        print(f"\n{name}, draws {numbers[0]}–{numbers[-1]}\n" + table([row for row in rows if row["set"] == name]))
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
