"""What the trials say: tables, findings, figures, pages."""
