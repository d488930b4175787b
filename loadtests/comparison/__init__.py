"""The side-by-side comparison: what the gateway costs, beside what one would use otherwise, on the same machine.

``python loadtests/compare.py`` runs it; ``loadtests/README.md`` says what it measures and how to read the report.

``machine``      which machine this is; the core that serves, and the cores for everything else
``processes``    start, pin, watch and end processes; the Postgres and the MLflow server that all contestants share
``contestants``  how each contestant is started and asked
``load``         the requests
``contest``      all contestants under the same load, in turn, several rounds
``figures``      the figures with targets that take a load of their own
``profiling``    where the time of a contestant's process goes
``report``       tables, JSON, met or not met
``serving``      the processes of the other contestants, and the model behind HTTP
``agent_folder`` the agent, and its model in the process
"""
