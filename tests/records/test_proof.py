"""What records of parity and bench say of their claims."""

from launcher.records.run import Verdict
from tests.support.records import bench_of, parity_record


def test_the_message_about_broken_claims_names_them_in_at_most_five_lines_and_the_report_says_so() -> None:
    broken = parity_record(verdicts=tuple(Verdict(f"claim {n}", n == 0, "figures" * 100) for n in range(6)))
    assert not broken.holds and parity_record().holds
    rule, *claims, remedy = broken.failure.splitlines()
    assert rule.startswith("the compiled path must compute") and remedy.startswith("Do not train with it")
    assert [claim[:14] for claim in claims] == ["claim 1: figur", "claim 2: figur", "claim 3: figur"]
    assert max(map(len, claims)) <= 300
    report = broken.as_report()
    assert (report["schema"], report["mode"], report["holds"]) == (1, "parity", False)
    assert report["batches"][0]["loss"] == {"compiled": 2.5, "eager": 2.6}


def test_the_report_has_every_figure_of_both_sides() -> None:
    report = bench_of().as_report()
    assert (report["mode"], report["holds"], report["rows"], report["speed_up"]) == ("bench", True, "data", 5.0)
    assert report["ours"]["step_ms"] == {"median": 100.0, "p20": 100.0, "p80": 100.0}
    assert report["ours"]["tokens_per_s"] == 1_000 and report["naive"]["before_mib"] == 400
    assert bench_of(None).as_report()["naive"] is None
