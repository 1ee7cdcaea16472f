"""What a figure is worth: sentences that go with it into text, JSON and tables."""

from __future__ import annotations

FEW = 2048
"""Below so many pictures a Fréchet distance mostly tells how few they are: the covariance of Inception's 2048 features
does not even have full rank."""
HARDLY = 50
"""Below so many pictures the kernel distance is mostly noise."""
RATES = 100
"""Below so many pictures a rate's 95 % interval is up to 0.2 wide and wider."""


def distance(pictures: int, real: int, subset: int) -> list[str]:
    """Of Fréchet and kernel distances of so many pictures; the kernel distance's spread is over subsets of `subset`."""
    fewest, said = min(pictures, real), []
    if fewest < FEW:
        said.append(
            f"few pictures: {pictures} against {real} real ones; a Fréchet distance is too high by what falls with "
            "their number: compare at equal counts only, and rather by the kernel distance"
        )
    if fewest < HARDLY:
        said.append(f"few pictures: of {fewest} the kernel distance itself is mostly noise")
    if 2 * subset > fewest:
        share = "all" if subset >= fewest else "most"
        said.append(
            f"few pictures: the kernel distance's spread is too small, as its subsets of {subset} hold {share} of the "
            f"{fewest} pictures"
        )
    return said


def kernel(pictures: int, real: int, subset: int) -> list[str]:
    """The same where no Fréchet distance is told."""
    return [said for said in distance(pictures, real, subset) if "Fréchet" not in said]


def discrepancy(pictures: int, real: int) -> list[str]:
    """Of CMMD, whose estimate keeps each picture's pair with itself."""
    if min(pictures, real) >= FEW:
        return []
    return [
        f"few pictures: {pictures} against {real} real ones; CMMD is too high by what falls with their number: "
        "compare at equal counts only"
    ]


def rates(pictures: int) -> list[str]:
    """Of shares of so many pictures."""
    return (
        [f"few pictures: read the 95 % interval and not the rate, which is of {pictures}"] if pictures < RATES else []
    )


def judged(knows: bool) -> list[str]:
    """Of what a CLIP says of pictures that were drawn under its own text states."""
    if not knows:
        return []
    return [
        "the judge's text tower is one of those that condition the model, so its figures flatter: see real pictures' "
        "(--real), or another judge (--clip)"
    ]


def candidates(asked: int, there: int) -> list[str]:
    """Of retrieval among fewer candidates than were asked for; chance is that of the fewer."""
    if asked <= there:
        return []
    return [f"candidates: {asked} were asked for, but there are {there} distinct captions: chosen among {there}"]
