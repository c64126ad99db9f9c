"""Running expert layers: the table in use, agreement between ranks, parallel layers."""
