"""How files of a run directory are called, for those who read one and load no framework for it."""

CONFIG_NAME = "config.yaml"
CHANGES_NAME = "plan_changes.jsonl"
TRANSCRIPTS_NAME = "transcripts"
