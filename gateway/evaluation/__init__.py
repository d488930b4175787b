"""The evaluator: takes finished traces out of the outbox, writes them to MLflow, scores them, feeds datasets.

Every step can be repeated: a score's id is derived from what was scored, by which scorer, in which version, so that a
repeated write changes nothing, in our tables or in MLflow. The order of the steps in `worker` is such that a crash at
any point loses nothing either.
"""
