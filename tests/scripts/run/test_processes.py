"""Processes of torchrun: a failure of all is reported by one."""

from torch.distributed import TCPStore

from scripts.run.processes import first_to_speak


def test_only_the_first_of_several_reports(monkeypatch):
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    for name, value in (address | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    assert [first_to_speak() for _ in range(3)] == [True, False, False]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert first_to_speak()
