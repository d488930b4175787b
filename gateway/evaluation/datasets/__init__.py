"""From live traffic to datasets: what rules put in, from where, each thing once, nothing that was forgotten.

``rules``       which rule takes what: settings and pure decisions
``collecting``  what scores put in, noted as soon as they are stored
``looking``     what people and tags in MLflow put in, looked for from time to time
``rows``        the table ``dataset_rows``, the truth of it all
``choosing``    which of the noted rows are taken: tags, daily cap, ``similarity`` to what is there
``conversion``  traces as records of MLflow's, with provenance, expectations, and how they can be ``replay``-ed
``feeder``      merges them, and takes out what was forgotten
``files``       records as files, out and in
"""

from gateway.evaluation.datasets.feeder import DatasetFeeder

__all__ = ["DatasetFeeder"]
