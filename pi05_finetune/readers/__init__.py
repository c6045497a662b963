"""Readers of recorded episodes: npz, LeRobotDataset v2.1 and v3.0, HDF5 of robosuite, robomimic and ALOHA."""
