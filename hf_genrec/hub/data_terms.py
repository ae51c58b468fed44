"""What the publishers of the named data sets ask of those who use them, for the data statement and for pushing.

Facts for people, no legal advice. A data set that is not listed has unknown terms, and the card says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataTerms:
    """Terms of one public data set.

    Args:
        title: its published name.
        terms: one sentence.
        url: the publisher's page.
        redistribution: may its files (item titles, say) be published again by anybody?
        papers: arXiv ids or DOIs that its publishers ask to cite.
    """

    title: str
    terms: str
    url: str
    redistribution: bool
    papers: tuple[str, ...] = ()


_GROUPLENS_100K = (
    "GroupLens terms: research use with acknowledgement; no redistribution and no commercial use without permission."
)
_GROUPLENS_LATEST = (
    "GroupLens terms: research use with acknowledgement; non-commercial; redistribution only under the same terms."
)
_AMAZON = "Amazon review data, published for research without a licence; treat item titles as not redistributable."
_AMAZON_URL = "https://jmcauley.ucsd.edu/data/amazon/"

DATA_TERMS: dict[str, DataTerms] = {
    "movielens-100k": DataTerms(
        "MovieLens 100K", _GROUPLENS_100K, "https://grouplens.org/datasets/movielens/100k/", False, ("10.1145/2827872",)
    ),
    "movielens-latest-small": DataTerms(
        "MovieLens latest small",
        _GROUPLENS_LATEST,
        "https://grouplens.org/datasets/movielens/latest/",
        False,
        ("10.1145/2827872",),
    ),
    "amazon-toys": DataTerms("Amazon reviews, Toys and Games (5-core)", _AMAZON, _AMAZON_URL, False),
    "amazon-games": DataTerms("Amazon reviews, Video Games", _AMAZON, _AMAZON_URL, False),
    "amazon-phone": DataTerms("Amazon reviews, Cell Phones and Accessories (5-core)", _AMAZON, _AMAZON_URL, False),
}
