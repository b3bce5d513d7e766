"""The study database: tables, statements, records, and Optuna's projection."""
