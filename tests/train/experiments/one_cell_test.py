from train.experiments import one_cell


def test_a_record_says_what_its_cell_was_given(monkeypatch):
  monkeypatch.setattr(one_cell, 'cores', lambda: 8)
  monkeypatch.delenv('NPROC', raising=False)
  assert one_cell.machine().endswith(', 8 cores')
  assert one_cell.machine(2).endswith(', 2 cores')
  # On a node of a cluster XLA is told how many of its cores it has.
  monkeypatch.setenv('NPROC', '1')
  assert one_cell.machine().endswith(', 1 core')
  monkeypatch.setenv('NPROC', '64')
  assert one_cell.machine().endswith(', 8 cores')
