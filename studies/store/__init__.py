"""The study database: tables, statements, records, and the projection into Optuna's tables."""
