import numpy as np
import pytest

from train.aot import groups as groups_lib

SHAPE = {'data': 2, 'fsdp': 2, 'tensor': 1, 'expert': 2}


@pytest.mark.parametrize(
  ('attributes', 'axes'),
  [
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}', 'expert'),
    ('channel_id=1, replica_groups={{0,2},{1,3},{4,6},{5,7}}', 'fsdp'),
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', 'data'),
    ('replica_groups={{0,1,2,3},{4,5,6,7}}', 'fsdp+expert'),
    ('replica_groups={}', 'data+fsdp+expert'),
    ('to_apply=%add', 'data+fsdp+expert'),
    ('replica_groups=[4,2]<=[8], x=1', 'expert'),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', 'data'),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', 'data+fsdp'),
    ('replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}', ''),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x=1", 'expert'),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 'data+fsdp'),
    ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", 'data'),
    ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2,'b'}", 'fsdp+expert'),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", 'fsdp'),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, x=1",
     'data+fsdp'),
    ('source_target_pairs={{0,1},{1,0},{2,3},{3,2}}', 'expert'),
    ('source_target_pairs={{0,2},{2,0},{1,1}}', 'fsdp'),
    ('source_target_pairs={{0,1},{1,2},{2,3},{3,0}}', 'fsdp+expert'),
  ],
)  # fmt: skip
def test_axes_of_groups(attributes, axes):
  groups = groups_lib.parse_groups(attributes, 8)
  are_pairs = 'pairs' in attributes
  assert groups_lib.axes_of(groups, SHAPE, are_pairs=are_pairs) == axes


def test_groups_of_a_part_of_their_axes_are_mixed():
  groups = groups_lib.parse_groups('replica_groups=[4,2]<=[8]', 8)
  assert groups_lib.axes_of(groups, {'data': 1, 'fsdp': 8}) == groups_lib.MIXED
  diagonal = groups_lib.parse_groups('replica_groups={{0,3},{1,2}}', 4)
  assert groups_lib.axes_of(diagonal, {'data': 2, 'fsdp': 2}) == 'mixed'


def test_groups_are_those_of_a_mesh_with_parts_of_axes():
  text = "replica_groups=mesh['a'=8,'b'=2] {'a':(2)2}"
  ids = np.arange(16).reshape(2, 2, 2, 2)  # a in three parts, then b.
  expected = {
    tuple(ids[i, :, k, b]) for i in (0, 1) for k in (0, 1) for b in (0, 1)
  }
  assert set(map(tuple, groups_lib.parse_groups(text, 16))) == expected


def test_an_unknown_form_is_an_error():
  with pytest.raises(ValueError, match='unknown groups'):
    groups_lib.parse_groups('replica_groups=all', 8)
