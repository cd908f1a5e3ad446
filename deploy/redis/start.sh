#!/bin/sh
# Start Redis with the users of users.acl beside this file.
#
# Their passwords are the files redis_publisher, redis_worker and redis_reader of $SECRETS. Redis is
# given the hashes alone. What follows the script's name goes to redis-server.
set -eu
umask 077

here=$(dirname "$0")
secrets=${SECRETS:-/run/secrets}
users=${USERS_FILE:-/tmp/users.acl}

acl=$(cat "$here/users.acl")
for name in publisher worker reader; do
  password=$(cat "$secrets/redis_$name")
  if [ "${#password}" -lt 16 ]; then
    echo "redis_$name: the password in $secrets has less than 16 characters. Use a longer one." >&2
    exit 1
  fi
  hash=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
  mark=$(echo "$name" | tr '[:lower:]' '[:upper:]')
  acl=$(echo "$acl" | sed "s/#$mark /#$hash /")
done
echo "$acl" > "$users"

exec redis-server "$here/redis.conf" --aclfile "$users" "$@"
