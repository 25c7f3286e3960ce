#!/bin/sh
# An MLflow server with basic authentication, on a PostgreSQL database and an S3 store, whose bucket it makes where it is missing.
# The first start makes the user `admin` with MLFLOW_AUTH_ADMIN_PASSWORD. Everything it needs comes in variables:
#   DATABASE_URI BUCKET MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
#   MLFLOW_S3_ENDPOINT_URL (none: Amazon's) · HOST (127.0.0.1) · PORT (5000) · WORKERS (4)
set -eu
: "${DATABASE_URI:?is needed: postgresql+psycopg2://user:password@host/database}" "${BUCKET:?is needed}"
: "${MLFLOW_AUTH_ADMIN_PASSWORD:?is needed}" "${MLFLOW_FLASK_SERVER_SECRET_KEY:?is needed}"

umask 077
MLFLOW_AUTH_CONFIG_PATH=$(mktemp)
export MLFLOW_AUTH_CONFIG_PATH
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<END
[mlflow]
default_permission = READ
database_uri = $(printf %s "$DATABASE_URI" | sed 's/%/%%/g')
admin_username = admin
END

python - <<'END'
import os
import boto3

store, bucket = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL")), os.environ["BUCKET"]
if bucket not in [known["Name"] for known in store.list_buckets()["Buckets"]]:
    store.create_bucket(Bucket=bucket)
END

exec python -m mlflow server --app-name basic-auth --backend-store-uri "$DATABASE_URI" \
  --artifacts-destination "s3://$BUCKET" --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-4}"
