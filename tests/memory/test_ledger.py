import torch

from launcher.memory.ledger import Ledger


def test_each_phase_is_recorded_and_growth_is_seen():
    ledger = Ledger(torch.device("cpu"))
    before = ledger.mark("before")
    held = torch.ones(64 * 2**20 // 4)  # 64 MiB, touched
    after = ledger.mark("after")
    assert after.allocated_mib - before.allocated_mib > 50
    assert after.peak_mib >= after.allocated_mib - 1
    assert after.total_mib > after.allocated_mib > 10
    assert [p.phase for p in ledger.phases] == ["before", "after"]
    assert "before" in ledger.as_text()
    assert held.numel()
